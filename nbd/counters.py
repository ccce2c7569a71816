"""What a connection has been asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Requests by kind, and payload bytes, of one connection or of all that have ended."""

    requests: int = 0
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    trims: int = 0
    zeroes: int = 0
    other: int = 0
    errors: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def add(self, other: Counters) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
