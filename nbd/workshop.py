"""What the connections of one server share, and what each of them may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nbd.fence import Fence

INBOX_BYTES: Final = (1 << 20) + (128 << 10)
"""The receive buffer. A WRITE that doesn't fit is taken in pieces."""
INLINE_READ_BYTES: Final = 1 << 20
"""A longer READ gets a buffer and a task of its own."""
ARENA_BYTES: Final = INLINE_READ_BYTES + (64 << 10)
"""The reply buffer: one inline READ, or a batch; and behind it the short replies of a pass."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may make the server hold."""

    connections: int = 1024
    connections_per_address: int = 0  # of one IP address; 0: as many as there may be at all
    handshakes: int = 128  # connections without an export yet; one more, and the oldest of them is dropped
    handshake_timeout_s: float = 10.0
    inflight_requests: int = 128  # per connection: requests that wait for the storage
    inflight_bytes: int = 64 << 20  # per connection: their payload and replies
    drain_grace_s: float = 1.0  # a server that stops waits so long for clients to take their replies and close
    linger_s: float = 10.0  # how long a leaving client may take to receive its last replies


class Bench:
    """A connection's two buffers, lent while it has work."""

    __slots__ = ("arena", "inbox")

    def __init__(self) -> None:
        self.inbox = memoryview(bytearray(INBOX_BYTES))
        self.arena = memoryview(bytearray(ARENA_BYTES))


class Workshop:
    """What the connections of one server share.

    The free benches: the one returned last, still in the CPU's cache, goes out first. And whose
    turn was last, by which a connection knows whether others are busy too. And who is connected to
    which export.
    """

    _KEPT: Final = 8

    def __init__(self) -> None:
        self._free: list[Bench] = []
        self.last_active: object = None
        self.fence = Fence()

    def take(self) -> Bench:
        return self._free.pop() if self._free else Bench()

    def give(self, bench: Bench) -> None:
        if len(self._free) < self._KEPT:
            self._free.append(bench)
