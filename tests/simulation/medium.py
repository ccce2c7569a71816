"""The bytes of a simulated device: what the kernel shows, what the medium has, and what may become of the difference.

`cache` is what the kernel shows; `durable` is what a power cut can't take. A write changes the cache and is remembered
as unsynced; `make_durable` is what a sync does. A power cut keeps an arbitrary (seeded) subset of the unsynced
512-byte sectors, whatever their order. A sync that fails forgets what was dirty, as Linux does: the cache goes on
showing bytes that the medium never gets.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Awaitable, Callable

from tiers.label import LABEL_OFFSETS, Label, encode_label

SECTOR = 512


class Medium:
    """The bytes of one device, which outlive every process and power cut."""

    def __init__(self, path: str, label: Label) -> None:
        self.path = path
        self.size = label.size_bytes
        self.cache = mmap.mmap(-1, self.size)
        self.durable = mmap.mmap(-1, self.size)
        self.unsynced: list[tuple[int, bytes]] = []
        self.lost: set[int] = set()
        """Sectors that a failed sync dropped: the cache shows other bytes than the medium has."""
        self.sync_count = 0
        # Faults, off unless a test sets them.
        self.missing = False
        """It was taken away."""
        self.failing_syncs = 0
        self.lying_syncs = False
        self.on_write: Callable[[int, int], tuple[int, int] | None] = lambda offset, length: None
        """(offset, length) -> None, or (errno, bytes that are taken nevertheless); errno 0 is a short write."""
        self.on_read: Callable[[int, int], int | None] = lambda offset, length: None
        self.before_read: Callable[[int, int], Awaitable[None]] | None = None
        self.before_sync: Callable[[], Awaitable[None]] | None = None
        for offset in LABEL_OFFSETS:
            sector = encode_label(label)
            self.cache[offset : offset + len(sector)] = self.durable[offset : offset + len(sector)] = sector

    def write(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        assert offset >= 0 and offset + len(data) <= self.size, "a write past the end of the device"
        self.cache[offset : offset + len(data)] = data
        self.unsynced.append((offset, data))
        if self.lost:
            self.lost.difference_update(range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)))

    def make_durable(self, count: int) -> None:
        """The oldest `count` unsynced writes reach the medium."""
        for offset, data in self.unsynced[:count]:
            self.durable[offset : offset + len(data)] = data
        del self.unsynced[:count]

    def drop_dirty(self, count: int) -> None:
        """A sync failed: the oldest `count` writes are marked clean without having reached the medium."""
        for offset, data in self.unsynced[:count]:
            self.lost.update(range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)))
        del self.unsynced[:count]

    def power_cut(self, rng: random.Random) -> None:
        """Keep some of the unsynced sectors, lose the rest and the cache."""
        touched = [(sector * SECTOR, SECTOR) for sector in self.lost]
        keep_write = rng.choice((0.0, 0.2, 0.5, 0.8, 0.95, 1.0))
        tear = rng.choice((0.0, 0.1, 0.5))
        for offset, data in self.unsynced:
            touched.append((offset, len(data)))
            kept = rng.random() < keep_write
            torn = rng.random() < tear
            if not torn:
                if kept:
                    self.durable[offset : offset + len(data)] = data
                continue
            share = rng.random()
            for at in range(0, len(data), SECTOR):
                if rng.random() < share:
                    self.durable[offset + at : offset + at + len(data[at : at + SECTOR])] = data[at : at + SECTOR]
        for offset, length in touched:
            self.cache[offset : offset + length] = self.durable[offset : offset + length]
        self.unsynced.clear()
        self.lost.clear()

    def flip(self, offset: int, bit: int = 0) -> None:
        """Rot: one bit, on the medium and in the cache."""
        for layer in (self.cache, self.durable):
            layer[offset] ^= 1 << bit

    def direct(self, offset: int, length: int) -> bytearray:
        """What a read past the page cache gives: dirty pages are written back first, lost ones can't be."""
        result = bytearray(self.cache[offset : offset + length])
        if self.lost:
            for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
                if sector in self.lost:
                    at = sector * SECTOR - offset
                    result[at : at + SECTOR] = self.durable[sector * SECTOR : sector * SECTOR + SECTOR]
        return result
